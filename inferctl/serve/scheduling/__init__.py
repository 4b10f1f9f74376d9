"""What is sent to which engine. The queue with admission control is `batching/batcher.py`."""
