"""What two or more stages share: device functions, tile choice, operator registration."""
