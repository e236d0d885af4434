"""Room 3: observation -> distribution over actions, and value; sampling."""

from upslope.policies.actor_critic import ActorCritic as ActorCritic
from upslope.policies.config import ActorCriticConfig as ActorCriticConfig
from upslope.policies.config import MemoryConfig as MemoryConfig
from upslope.policies.config import build_head as build_head
from upslope.policies.continuous import Beta as Beta
from upslope.policies.continuous import Gaussian as Gaussian
from upslope.policies.continuous import SquashedGaussian as SquashedGaussian
from upslope.policies.distributions import Bernoulli as Bernoulli
from upslope.policies.distributions import Categorical as Categorical
from upslope.policies.distributions import Head as Head
from upslope.policies.distributions import HeadDistribution as HeadDistribution
from upslope.policies.distributions import MultiCategorical as MultiCategorical
from upslope.policies.networks import MLP as MLP
from upslope.policies.networks import ImageEncoder as ImageEncoder
from upslope.policies.networks import VectorEncoder as VectorEncoder
from upslope.policies.normalizer import ObservationNormalizer as ObservationNormalizer
from upslope.policies.normalizer import RewardNormalizer as RewardNormalizer
from upslope.policies.sampler import ActorSampler as ActorSampler
