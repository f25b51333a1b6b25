"""The rule table: how each op behaves when its operands are sharded."""
