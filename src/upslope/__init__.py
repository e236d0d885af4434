"""upslope: policy gradients from the theorem to practice."""
