"""The server: one endpoint per task, engines in processes of their own, and vLLM behind the same edge."""
