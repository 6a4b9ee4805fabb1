"""Offline job: a Hugging Face model in, a restored long-context model out."""
