"""The only room that touches the outside world: Gymnasium's words become ours at this door."""

from upslope.collect.autoreset import GymnasiumVector as GymnasiumVector
from upslope.collect.convert import convert_action_space as convert_action_space
from upslope.collect.convert import convert_observation_space as convert_observation_space
from upslope.collect.environments import EnvironmentCollector as EnvironmentCollector
from upslope.collect.errors import EnvironmentFailureError as EnvironmentFailureError
from upslope.collect.errors import NonFiniteError as NonFiniteError
from upslope.collect.errors import UnknownEnvironmentError as UnknownEnvironmentError
from upslope.collect.errors import UnsupportedAutoresetError as UnsupportedAutoresetError
from upslope.collect.errors import UnsupportedSpaceError as UnsupportedSpaceError
from upslope.collect.evaluation import EvaluationResult as EvaluationResult
from upslope.collect.evaluation import evaluate_policy as evaluate_policy
from upslope.collect.make import EnvironmentConfig as EnvironmentConfig
from upslope.collect.make import Resolution as Resolution
from upslope.collect.make import Source as Source
from upslope.collect.make import environment_factory as environment_factory
from upslope.collect.make import make_environments as make_environments
from upslope.collect.make import resolve_environments as resolve_environments
from upslope.collect.snapshot import Snapshotable as Snapshotable
from upslope.collect.vector import Step as Step
from upslope.collect.vector import SyncEnvironments as SyncEnvironments
from upslope.collect.vector import VectorEnvironment as VectorEnvironment
from upslope.collect.workers import AsyncEnvironments as AsyncEnvironments
