"""Recipes: plain functions that return complete configurations."""

from upslope.recipes.control import acrobot_ppo as acrobot_ppo
from upslope.recipes.control import bipedalwalker_ppo as bipedalwalker_ppo
from upslope.recipes.control import breakout_ppo as breakout_ppo
from upslope.recipes.control import cartpole_a2c as cartpole_a2c
from upslope.recipes.control import cartpole_actor_critic as cartpole_actor_critic
from upslope.recipes.control import cartpole_baseline as cartpole_baseline
from upslope.recipes.control import cartpole_ppo as cartpole_ppo
from upslope.recipes.control import cartpole_reinforce as cartpole_reinforce
from upslope.recipes.control import halfcheetah_ppo as halfcheetah_ppo
from upslope.recipes.control import hopper_ppo as hopper_ppo
from upslope.recipes.control import lunarlander_ppo as lunarlander_ppo
from upslope.recipes.control import mountaincar_continuous_ppo as mountaincar_continuous_ppo
from upslope.recipes.control import pendulum_ppo as pendulum_ppo
from upslope.recipes.control import walker2d_ppo as walker2d_ppo
from upslope.recipes.presets import ppo_cleanrl as ppo_cleanrl
from upslope.recipes.presets import ppo_paper as ppo_paper
from upslope.recipes.presets import ppo_sb3 as ppo_sb3
from upslope.recipes.registry import RECIPES as RECIPES
from upslope.recipes.registry import load_recipe as load_recipe
from upslope.recipes.tables import short_corridor_actor_critic as short_corridor_actor_critic
from upslope.recipes.tables import short_corridor_baseline as short_corridor_baseline
from upslope.recipes.tables import short_corridor_reinforce as short_corridor_reinforce
from upslope.recipes.tables import six_state_ppo as six_state_ppo
