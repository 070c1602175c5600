"""vLLM, serving: a plugin that lets each request use its own adapter of any kind."""
