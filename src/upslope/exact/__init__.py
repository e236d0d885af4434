"""Problems small enough to enumerate, and what is exactly true of a policy on them."""

from upslope.exact.enumeration import Rows as Rows
from upslope.exact.enumeration import enumerate_episodes as enumerate_episodes
from upslope.exact.enumeration import enumerate_fragments as enumerate_fragments
from upslope.exact.enumeration import state_time_occupancy as state_time_occupancy
from upslope.exact.finite import FiniteMDP as FiniteMDP
from upslope.exact.finite import Kind as Kind
from upslope.exact.policies import LinearPolicy as LinearPolicy
from upslope.exact.policies import StatePolicy as StatePolicy
from upslope.exact.policies import TabularPolicy as TabularPolicy
from upslope.exact.solve import Solution as Solution
from upslope.exact.solve import action_probabilities as action_probabilities
