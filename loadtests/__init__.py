"""Measures an OpenAI-compatible server over HTTP: latency, memory, and whether answers stay right."""
