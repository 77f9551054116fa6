"""What must hold for any attention. A law is a function that returns, or raises AssertionError saying what is off."""
