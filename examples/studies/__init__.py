"""What was studied with the forecaster; results lie in ``examples/results``."""
