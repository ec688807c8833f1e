"""Other people's ways of getting a model out of a bucket, each told the same endpoint, keys and files.

A module's `prepare(target, …)` imports and sets up whatever a long-lived process would have ready, and returns the
call that is timed.
"""
