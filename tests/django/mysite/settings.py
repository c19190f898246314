"""The settings of a Django project, for docs/snippets/django_asgi.py."""

import os

SECRET_KEY = "of nobody's, and long enough for its checks, which count fifty"
ALLOWED_HOSTS = ["testserver"]
ROOT_URLCONF = "mysite.urls"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DJANGO_DATABASE"]}}
