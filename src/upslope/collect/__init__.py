"""The only room that touches the outside world: Gymnasium's words become ours at this door."""

from upslope.collect.convert import convert_action_space as convert_action_space
from upslope.collect.convert import convert_observation_space as convert_observation_space
from upslope.collect.environments import EnvironmentCollector as EnvironmentCollector
from upslope.collect.errors import EnvironmentFailureError as EnvironmentFailureError
from upslope.collect.errors import NonFiniteError as NonFiniteError
from upslope.collect.errors import UnknownEnvironmentError as UnknownEnvironmentError
from upslope.collect.errors import UnsupportedSpaceError as UnsupportedSpaceError
from upslope.collect.evaluation import EvaluationResult as EvaluationResult
from upslope.collect.evaluation import evaluate_policy as evaluate_policy
from upslope.collect.vector import Step as Step
from upslope.collect.vector import SyncEnvironments as SyncEnvironments
from upslope.collect.vector import VectorEnvironment as VectorEnvironment
