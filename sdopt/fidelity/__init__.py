"""Whether two candidates draw the same picture. It knows pipelines and pictures, and nothing of time or
cost.
"""
