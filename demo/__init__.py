"""The whole system on one machine, with nothing rented: an embedded S3 server, a small real model, one picture.

Nothing that is deployed imports this package; `make demo` and the tests do.
"""
