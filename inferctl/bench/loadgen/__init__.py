"""The load generator. It runs in Locust's processes, under gevent. inferctl imports only `recorder`, for records."""
