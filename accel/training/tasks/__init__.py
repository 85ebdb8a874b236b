"""What each trainer teaches: a module, its loss and a sample grid."""
