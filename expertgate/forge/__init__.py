"""Making experts: a public model, closed experts trained alone beside it, and their merge."""
