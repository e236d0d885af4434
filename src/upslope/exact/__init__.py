"""Problems small enough to enumerate, and what is exactly true of a policy on them."""

from upslope.exact.enumeration import Rows as Rows
from upslope.exact.enumeration import enumerate_episodes as enumerate_episodes
from upslope.exact.enumeration import enumerate_fragments as enumerate_fragments
from upslope.exact.enumeration import state_time_occupancy as state_time_occupancy
from upslope.exact.finite import FiniteMDP as FiniteMDP
from upslope.exact.finite import Kind as Kind
from upslope.exact.language import PrefixTable as PrefixTable
from upslope.exact.language import TinyTransformer as TinyTransformer
from upslope.exact.language import TokenPolicy as TokenPolicy
from upslope.exact.policies import LinearPolicy as LinearPolicy
from upslope.exact.policies import StatePolicy as StatePolicy
from upslope.exact.policies import TabularPolicy as TabularPolicy
from upslope.exact.solve import Solution as Solution
from upslope.exact.solve import action_probabilities as action_probabilities
from upslope.exact.token_groups import Groups as Groups
from upslope.exact.token_groups import enumerate_groups as enumerate_groups
from upslope.exact.token_problems import TOKEN_PROBLEMS as TOKEN_PROBLEMS
from upslope.exact.token_problems import token_problem as token_problem
from upslope.exact.tokens import TokenMDP as TokenMDP
from upslope.exact.tokens import Tokens as Tokens
from upslope.exact.tokens import enumerate_completions as enumerate_completions
from upslope.exact.tokens import next_log_prob as next_log_prob
from upslope.exact.tokens import sample_completions as sample_completions
