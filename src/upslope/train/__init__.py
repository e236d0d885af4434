"""Training: the loop, the optimiser step, checkpoints, run directories, logging and evaluation."""

from upslope.train.config import CheckpointConfig as CheckpointConfig
from upslope.train.config import EvaluationConfig as EvaluationConfig
from upslope.train.config import LogConfig as LogConfig
from upslope.train.config import OptimizerConfig as OptimizerConfig
from upslope.train.config import RolloutConfig as RolloutConfig
from upslope.train.config import Run as Run
from upslope.train.config import ShapingConfig as ShapingConfig
from upslope.train.evaluate import EvaluationReport as EvaluationReport
from upslope.train.evaluate import evaluate_run as evaluate_run
from upslope.train.language.config import LanguageEvaluationConfig as LanguageEvaluationConfig
from upslope.train.language.config import LanguageLogConfig as LanguageLogConfig
from upslope.train.language.config import LanguageRun as LanguageRun
from upslope.train.language.config import RewardConfig as RewardConfig
from upslope.train.language.judge import evaluate_language_run as evaluate_language_run
from upslope.train.loop import Result as Result
from upslope.train.loop import Snapshot as Snapshot
from upslope.train.saving import load as load
from upslope.train.saving import load_language as load_language
from upslope.train.saving import save as save
from upslope.train.start import resume as resume
from upslope.train.start import train as train
