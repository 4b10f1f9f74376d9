"""What a server says about itself: metrics, request log, traces, usage events, and `GET /info`."""
