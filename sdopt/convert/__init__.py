"""Recipe -> plan -> bundle: the only package that knows every stage."""
