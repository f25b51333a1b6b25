"""Program to program: what turns a captured model into one with a menu of strategies."""
