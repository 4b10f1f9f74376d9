"""API keys and limits: who may send a request, and how many. Pure logic, without HTTP and without asking a store."""
