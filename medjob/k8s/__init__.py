"""The run on a cluster: the orchestrator that walks the line, and the client's verbs."""
