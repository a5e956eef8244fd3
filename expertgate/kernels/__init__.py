"""The masked mixture-of-experts layer. torch and triton alone."""
