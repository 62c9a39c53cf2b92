"""How near, how right, how sure: outputs of two models compared, accuracy on labels."""
