"""A small forecaster for real series: data, model, training, tables and pictures."""
