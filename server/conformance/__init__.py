"""The conformance suite: does a server treat a reasoning model's thoughts right? It asks over HTTP, of any server."""
