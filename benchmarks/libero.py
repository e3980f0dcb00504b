"""LIBERO: stub"""
TRIALS = 50
def arguments(add):
    pass
