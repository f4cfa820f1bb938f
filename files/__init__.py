"""What people hand over: pictures, COCO's JSON, downloads; and the one error for bad input."""
