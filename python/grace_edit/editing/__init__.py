"""What an edit costs the model: training a value, proving it, measuring the drift of queries."""
