"""What several tests share: small checkpoints, and oracles to compare with."""
