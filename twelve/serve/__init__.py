"""Talking to a model: the HTTP server with OpenAI's protocol, its page, and the terminal."""

__all__ = ["app", "bind", "run", "url_of"]


def __getattr__(name: str):
    # the terminal needs no web server
    if name in __all__:
        from twelve.serve import server

        return getattr(server, name)
    raise AttributeError(f"module 'twelve.serve' has no attribute {name!r}")
