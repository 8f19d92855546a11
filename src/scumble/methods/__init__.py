"""Methods: ways to train. Each is data + trainables + loss, as a Plan; none is a loop."""
