-- One database a server. Runs once, when the volume is new; Prefect searches names with trigrams.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
\connect prefect
CREATE EXTENSION IF NOT EXISTS pg_trgm;
