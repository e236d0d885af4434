"""From run directories to what people look at: comparisons over seeds, tables and learning curves."""

from upslope.report.compare import DEFAULT_METRIC as DEFAULT_METRIC
from upslope.report.compare import Comparison as Comparison
from upslope.report.compare import Group as Group
from upslope.report.compare import RunCurve as RunCurve
from upslope.report.compare import compare as compare
from upslope.report.compare import read_curve as read_curve
from upslope.report.curve import draw as draw
from upslope.report.curve import draw_language as draw_language
from upslope.report.curve import learning_curve as learning_curve
from upslope.report.statistics import bootstrap_interval as bootstrap_interval
from upslope.report.statistics import interquartile_mean as interquartile_mean
