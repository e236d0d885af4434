"""The policy gradient theorem, computed: exact gradients on finite MDPs, as flat vectors over given parameters.

    grad J_gamma            = sum_s eta_gamma(s) sum_a grad pi(a|s) q_gamma(s, a)          discounted
    (no gradient of J)        sum_s eta_1(s)     sum_a grad pi(a|s) q_gamma(s, a)          undiscounted_states
    grad r_bar              = sum_s mu(s)        sum_a grad pi(a|s) q~(s, a)               average_reward
"""
