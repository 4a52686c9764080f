"""What people see in pictures, as networks with weights of their own judge it. sdopt ships none of these weights: a
path on this machine turns each on, nothing is fetched, and no pickle is read in this process.
"""
