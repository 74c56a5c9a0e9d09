"""What moonfx needs from torch's private side; no other folder touches it.

A new torch release is this one folder's work.
"""
