"""What `serve.py` does: texts over HTTP, in OpenAI's protocol."""
