"""A study in W&B: one run per cell, one for its tables, a workspace that compares methods.

W&B is a mirror. Everything is on disk before a run is made of it, runs are first written as offline files, which needs
neither a key nor a network, and an upload is one bounded step after that. Nothing here can make a study fail.

``runs`` says what is logged, ``mode`` whether it is uploaded, ``offline`` writes and uploads, ``workspace`` compares.
"""
