"""upslope: policy gradients from the theorem to practice."""

from upslope import estimators as estimators
from upslope import recipes as recipes
from upslope.algorithms import A2C as A2C
from upslope.algorithms import PPO as PPO
from upslope.algorithms import OneStepActorCritic as OneStepActorCritic
from upslope.algorithms import Reinforce as Reinforce
from upslope.collect import EnvironmentConfig as EnvironmentConfig
from upslope.policies import ActorCritic as ActorCritic
from upslope.policies import ActorCriticConfig as ActorCriticConfig
from upslope.train import CheckpointConfig as CheckpointConfig
from upslope.train import EvaluationConfig as EvaluationConfig
from upslope.train import EvaluationReport as EvaluationReport
from upslope.train import LogConfig as LogConfig
from upslope.train import OptimizerConfig as OptimizerConfig
from upslope.train import Result as Result
from upslope.train import RolloutConfig as RolloutConfig
from upslope.train import Run as Run
from upslope.train import Snapshot as Snapshot
from upslope.train import evaluate_run as evaluate_run
from upslope.train import load as load
from upslope.train import resume as resume
from upslope.train import save as save
from upslope.train import train as train
from upslope.trajectory import Trajectory as Trajectory
