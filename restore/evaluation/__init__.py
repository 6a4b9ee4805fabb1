"""What a model can do, measured: perplexity over long windows, needles in book text, short tasks, and what differs."""
