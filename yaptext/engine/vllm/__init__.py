"""vLLM, whose engines are processes of this one: the only room that imports it."""
