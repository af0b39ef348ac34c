"""The sticky Markov task: one attention head learns to predict a hidden chain from noisy observations."""
