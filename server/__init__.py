"""An OpenAI-compatible gateway that supervises one vLLM engine process."""
