"""The rows of the verification table: what every exported estimator and algorithm declares, and how it is measured."""
