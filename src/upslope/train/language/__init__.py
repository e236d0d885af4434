"""Runs that train language models: their configuration, their session and how they are judged."""

from upslope.train.language.config import LanguageEvaluationConfig as LanguageEvaluationConfig
from upslope.train.language.config import LanguageLogConfig as LanguageLogConfig
from upslope.train.language.config import LanguageRun as LanguageRun
from upslope.train.language.config import RewardConfig as RewardConfig
