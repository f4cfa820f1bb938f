"""The files of users: images, COCO's JSON, downloads, model folders; and the one error for bad input."""
