"""One paper, one file: frozen hyperparameters and their formulas, composed from the estimators."""

from upslope.algorithms.actor_critic import A2C as A2C
from upslope.algorithms.actor_critic import OneStepActorCritic as OneStepActorCritic
from upslope.algorithms.average_reward import AverageReward as AverageReward
from upslope.algorithms.grpo import GRPO as GRPO
from upslope.algorithms.kto import KTO as KTO
from upslope.algorithms.npg import NPG as NPG
from upslope.algorithms.ppo import PPO as PPO
from upslope.algorithms.preference import Preference as Preference
from upslope.algorithms.protocol import Algorithm as Algorithm
from upslope.algorithms.protocol import Condition as Condition
from upslope.algorithms.protocol import GradientName as GradientName
from upslope.algorithms.protocol import Loss as Loss
from upslope.algorithms.protocol import Now as Now
from upslope.algorithms.protocol import Passes as Passes
from upslope.algorithms.protocol import Penalty as Penalty
from upslope.algorithms.protocol import Target as Target
from upslope.algorithms.protocol import Traces as Traces
from upslope.algorithms.protocol import scheduled as scheduled
from upslope.algorithms.reference_kl import ReferenceKL as ReferenceKL
from upslope.algorithms.reinforce import Reinforce as Reinforce
from upslope.algorithms.reward_model import RewardModel as RewardModel
from upslope.algorithms.rloo import RLOO as RLOO
from upslope.algorithms.sft import SFT as SFT
from upslope.algorithms.traces import ActorCriticLambda as ActorCriticLambda
from upslope.algorithms.traces import TDLambda as TDLambda
from upslope.algorithms.trpo import TRPO as TRPO
